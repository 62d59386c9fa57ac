"""From a file to pixels: decoding, pixel formats, preprocessing."""
