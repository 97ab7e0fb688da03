"""The machine's own numbers and names: namespaces, tables, sysctls, rulesets, processes."""
