"""The endpoints: what HTTP asks, turned into what `contract.Service` does, and its answers into what clients know."""
