"""Plan through a world model: search for the actions whose predicted end is nearest to a goal."""
