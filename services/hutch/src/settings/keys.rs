//! Every key that can be set, with its meaning: for `config show`, and to guess what was meant.

use hutch_proto::LimitsSpec;

/// One key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    pub(crate) path: &'static str,
    pub(crate) about: &'static str,
    /// Whether it holds a list; in the environment its items are set apart by commas.
    pub(crate) list: bool,
}

const fn key(path: &'static str, about: &'static str) -> Key {
    Key { path, about, list: false }
}

const fn list(path: &'static str, about: &'static str) -> Key {
    Key { path, about, list: true }
}

/// All keys but the limits, in the order in which they are shown.
pub(crate) const KEYS: &[Key] = &[
    key("listen", "address of `up`, `worker` and `gateway`"),
    key("data_dir", "where everything is kept"),
    key("broker.url", "amqp://…; the embedded queue if not set"),
    key("store.url", "file:///… or s3://bucket/prefix; the data directory if not set"),
    key("gateway.tokens_file", "who may do what; needed beyond loopback"),
    key("gateway.max_blob_bytes", "largest upload"),
    key("worker.name", "in results and metrics"),
    key("worker.slots", "jobs that run at one time"),
    list("worker.queues", "queues to take jobs from"),
    key("worker.allow_host_layer", "whether jobs may stack the host's programs"),
    list("worker.allowed_host_paths", "below these, host_path volumes may lie"),
    list("worker.layer_dirs", "below these, dir: layers may lie"),
    list("worker.metric_labels", "labels of jobs that become labels of metrics"),
    key("worker.scratch_memory_bytes", "up to this disk_bytes, what a job writes lives in memory"),
    key("worker.prepare_ahead", "whether each slot has a sandbox's init and a cgroup waiting"),
    key("worker.network_namespace", "of a job: fresh, or per-slot, its slot's own if untouched"),
    key("worker.max_input_bytes", "blobs of one job together"),
    key("worker.max_archive_bytes", "output files of one job together"),
    key("worker.max_output_files", "output files of one job that are listed"),
    key("worker.max_layer_bytes", "one layer, uncompressed"),
    key("worker.max_layer_entries", "files and directories of one layer"),
    key("worker.pull_images", "whether images that are not here are fetched from their registries"),
    list("worker.insecure_registries", "registries without TLS, beside those of this machine"),
    key("worker.registry_logins", "a Docker config file with logins of registries"),
    key("worker.seccomp.profile", "which system calls jobs may make: default or strict"),
    key("worker.seccomp.refused", "what becomes of one that is refused: errno, report or kill"),
    key("worker.egress.enabled", "whether jobs may have a way out to the internet"),
    list("worker.egress.allow", "what they reach that is not of the internet: 10.1.0.0/16, 10.1.2.3:443"),
    list("worker.egress.deny", "what they do not reach, whatever else is said"),
    key("worker.prove", "whether jobs are taken only once attacks on a sandbox were held"),
    key("worker.drain_grace", "how long running jobs may go on at the end"),
    key("worker.lease", "how long a job is held without a sign of life"),
    key("worker.store_patience", "how long a store that fails is waited for"),
];

/// The names of the limits, each a key of `worker.default_limits` and `worker.max_limits`.
pub(crate) fn limits() -> Vec<String> {
    let mut names: Vec<String> = LimitsSpec::NUMBERS.iter().map(|name| (*name).to_owned()).collect();
    names.extend(["cpuset".to_owned(), "output_overflow".to_owned()]);
    names
}

/// Every key, limits included.
pub(crate) fn all() -> Vec<String> {
    let mut paths: Vec<String> = KEYS.iter().map(|key| key.path.to_owned()).collect();
    for table in ["worker.default_limits", "worker.max_limits"] {
        paths.extend(limits().iter().map(|name| format!("{table}.{name}")));
    }
    paths
}

/// The key that was likely meant, if one is near enough.
pub(crate) fn nearest(wrong: &str) -> Option<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    all()
        .into_iter()
        .map(|key| {
            let whole = strsim::damerau_levenshtein(wrong, &key);
            // `slots` alone, where `worker.slots` is meant.
            let tail = strsim::damerau_levenshtein(&last(wrong), &last(&key)) + 1;
            (whole.min(tail), key)
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, key)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_understood() {
        assert_eq!(nearest("worker.slotz").as_deref(), Some("worker.slots"));
        assert_eq!(nearest("slots").as_deref(), Some("worker.slots"));
        assert_eq!(nearest("broker.uri").as_deref(), Some("broker.url"));
        assert_eq!(
            nearest("worker.max_limits.memory_byte").as_deref(),
            Some("worker.max_limits.memory_bytes")
        );
        assert_eq!(nearest("something.else.entirely"), None);
    }

    #[test]
    fn every_limit_is_a_key() {
        assert_eq!(limits().len(), 24, "{:?}", limits());
    }
}
