//! End-to-end tests of hutch; see the `tests` folder of this crate.
