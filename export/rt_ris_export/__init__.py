"""From a checkpoint to a gated bundle; needs the extra ``export``."""
