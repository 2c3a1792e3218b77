"""How the rounds of bipartite matching are computed."""
