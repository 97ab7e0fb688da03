"""Who: the fewest keys, of whatever grouping, that explain most of what is held or refused.

``weigh`` what every pair holds; ``lattice`` each pair's key in every grouping, and the choice;
``names`` what keys are called; ``answer`` the choice kept from second to second; ``rows`` the
chosen keys as culprits.
"""
