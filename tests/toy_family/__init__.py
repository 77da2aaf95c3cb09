"""A model family of a third party: unlike the shipped one in every name, size and ratio."""
