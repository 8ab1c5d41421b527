"""The server's face: the service (pure logic over the store), its HTTP form, and the cell's own image registry."""
