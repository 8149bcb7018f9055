"""What a user does with an installed model: install, look, chat."""
