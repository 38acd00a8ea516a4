"""The web page that app.py serves: its tabs, the cards they show, its style and its script. Widgets and callbacks, no maths."""
