"""One prompt, without processes and HTTP: what goes in, what comes out, and its life."""
