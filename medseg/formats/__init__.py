"""Medical files to arrays and back."""
