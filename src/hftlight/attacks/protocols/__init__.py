"""Published protocols, one YAML file each."""
