"""A pass and a target for sora-compile, as a package of somebody else's."""
