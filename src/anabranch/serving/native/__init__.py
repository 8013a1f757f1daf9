"""One decoder step as one C++ call."""
