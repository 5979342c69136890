//! Checks of settings for what their types cannot say: whatever a service would refuse at its start is refused when
//! the settings are read, and so by `hutch config show` too.

use std::collections::HashMap;

use anyhow::bail;

use super::{Settings, show};

/// What the types cannot say.
pub(super) fn check(settings: &Settings) -> anyhow::Result<()> {
    let worker = &settings.worker;
    if !(1..=1024).contains(&worker.slots) {
        bail!("worker.slots: 1 to 1024 are possible, not {}", worker.slots);
    }
    if worker.queues.is_empty() {
        bail!("worker.queues: at least one queue is needed, such as [\"default\"]");
    }
    for name in worker.queues.iter().chain([&worker.name]) {
        if !hutch_proto::is_name(name) {
            bail!(
                "`{name}` is no name of a queue or worker: 1 to 63 letters, digits, `-`, `_` and `.` are expected"
            );
        }
    }
    for path in worker.allowed_host_paths.iter().chain(&worker.layer_dirs) {
        if !path.is_absolute() {
            bail!(
                "{} is not absolute: worker.allowed_host_paths and worker.layer_dirs must be",
                path.display()
            );
        }
    }
    if worker.lease.0 < 1000 {
        bail!("worker.lease: at least 1s is needed, not {}", worker.lease);
    }
    check_metric_labels(&worker.metric_labels)?;
    check_addresses(settings)?;
    settings.egress()?;
    settings.limits().map(drop)
}

/// As the worker's metrics will have them: `-` and `.` become `_`.
fn check_metric_labels(labels: &[String]) -> anyhow::Result<()> {
    let mut taken: HashMap<String, &str> =
        ["queue", "status", "reason"].map(|own| (own.to_owned(), "the metrics' own")).into();
    for label in labels {
        if !hutch_proto::is_name(label) || label.starts_with(|first: char| first.is_ascii_digit()) {
            bail!(
                "worker.metric_labels: `{label}` cannot be a label of metrics: letters, digits, `-`, `_` and `.` are \
                 expected, the first a letter"
            );
        }
        if let Some(other) = taken.insert(label.replace(['-', '.'], "_"), label) {
            bail!(
                "worker.metric_labels: `{label}` clashes with {other}: one that differs from the others and from \
                 queue, status and reason is expected"
            );
        }
    }
    Ok(())
}

/// What `listen`, `store.url` and `broker.url` must look like. Whether anybody is there is found out later.
fn check_addresses(settings: &Settings) -> anyhow::Result<()> {
    if let Some(address) = &settings.listen {
        let parts = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
        if !matches!(parts, Some((host, Ok(_))) if !host.is_empty()) {
            bail!("listen: `{address}` is no address: one such as 127.0.0.1:7070 is expected");
        }
    }
    if let Some(url) = &settings.store.url {
        let known = match url.split_once("://") {
            Some(("file", path)) => path.starts_with('/'),
            Some(("s3", bucket)) => !bucket.is_empty() && !bucket.starts_with('/'),
            Some(("memory", _)) => true,
            _ => false,
        };
        if !known {
            bail!(
                "store.url: `{}` is not a store: an address such as file:///srv/hutch or s3://bucket/prefix is expected",
                show::masked(url)
            );
        }
    }
    if let Some(url) = &settings.broker.url
        && url.strip_prefix("amqp://").is_none_or(str::is_empty)
    {
        bail!(
            "broker.url: `{}` is no broker: an address such as amqp://user:password@host:5672 is expected; amqps:// \
             is not built in, a TLS proxy on this host serves instead",
            show::masked(url)
        );
    }
    Ok(())
}
