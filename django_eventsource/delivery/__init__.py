"""From the channel layer to the buffers of the streams; no HTTP."""
