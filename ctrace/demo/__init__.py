"""The incident of the README, with real traffic in private network namespaces."""
