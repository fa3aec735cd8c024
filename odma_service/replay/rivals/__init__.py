"""Memory managers that the policies are compared with."""
