"""Scenes made of cut-out objects on photographs, with sentences that are true by construction."""
