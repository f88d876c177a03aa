"""Short programs that use the public interface only. A package, so that benchmarks and tests can import them too."""
