import os

storage = os.path.abspath("runs")
