"""The format of the released EchoX weights: its shapes and names, import into our folders, and export from runs."""
