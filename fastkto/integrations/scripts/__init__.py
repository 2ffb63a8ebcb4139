"""What launchers start as a script; in a folder of its own, which they put on the import path."""
