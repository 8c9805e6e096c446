"""Screens of MiniWoB++ pages: the browser that draws them, and what is to be clicked on them."""
