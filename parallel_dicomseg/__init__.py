"""From a folder of medical images and somebody's outlines to one HDF5 training set."""
