"""What a person wants to see of a converted file: pictures and an inventory."""
