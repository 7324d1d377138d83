"""What an action is: transformations of an image, or what somebody else recorded."""
