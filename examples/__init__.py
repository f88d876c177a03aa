"""Short programs that use the public interface only. A package, so that tests can import them too."""
