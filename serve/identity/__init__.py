"""Who is it? Identities enrolled, named or unknown by a calibrated threshold, followed over tracks, forgotten."""
