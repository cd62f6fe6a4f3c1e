"""What every part uses: files, progress, and where a result comes from. Knows no other part."""
