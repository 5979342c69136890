//! End-to-end tests of hutch; see the `tests` folder of this crate. What they share is here.

pub mod broker;
pub mod proxy;

/// Shows the logs of what is tested, as `RUST_LOG` asks for.
pub fn log() {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    // Another test of this process has done so before.
    drop(logs);
}
