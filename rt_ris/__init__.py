"""Referring image segmentation on the edge: the lean runtime.

``Predictor.load(bundle)``, ``.set_image(picture)``, ``.segment("the red cup")``.
"""

__version__ = "0.1.0"
