"""Shape or texture: which of the two an encoder goes by, on pictures in which they disagree (Geirhos et al., ICLR 2019)."""
