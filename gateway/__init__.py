"""The REST side of keymesh: stateless, at the site of its SAEs; knows the mesh only through mesh.client."""
