"""Architectures, data, training and evaluation of rt-ris; needs the extra ``train``."""
