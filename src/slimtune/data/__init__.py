"""From files to proven, packed token ids."""
