"""Control images made from pictures: edges and depth."""
