"""Every operator in plain torch, as its formula reads: what the native operators are tested against."""
