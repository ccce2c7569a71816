"""systemd units and udev rules, as templates: `terrace install-units` fills them in (`terrace/unitfiles.py`)."""
