//! The layers that are not a file, in the terms of the `config` crate.

use config::{Config, ConfigError, Map, Source, Value, ValueKind};

use super::default_data_dir;
use super::keys::KEYS;

/// What the command line sets, and what differs by command.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flags {
    /// Key, value, and the flag as it is written.
    set: Vec<(&'static str, ValueKind, &'static str)>,
    /// Defaults of this command alone.
    defaults: Vec<(&'static str, ValueKind)>,
}

impl Flags {
    /// A key that a flag sets, if it was given.
    #[must_use]
    pub(crate) fn set<T: Into<ValueKind>>(
        mut self,
        key: &'static str,
        flag: &'static str,
        value: Option<T>,
    ) -> Self {
        self.set.extend(value.map(|value| (key, value.into(), flag)));
        self
    }

    /// A list that a repeatable flag sets, if it was given.
    #[must_use]
    pub(crate) fn set_list(self, key: &'static str, flag: &'static str, values: &[String]) -> Self {
        let given = (!values.is_empty()).then(|| values.to_vec());
        self.set(key, flag, given)
    }

    /// A default that this command has and others have not.
    #[must_use]
    pub(crate) fn default_of(mut self, key: &'static str, value: impl Into<ValueKind>) -> Self {
        self.defaults.push((key, value.into()));
        self
    }
}

/// Values with their origins.
#[derive(Debug, Clone)]
pub(super) struct Layer(Vec<(String, ValueKind, String)>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        let values =
            self.0.iter().map(|(key, kind, origin)| (key.clone(), Value::new(Some(origin), kind.clone())));
        Ok(values.collect())
    }
}

/// The defaults of everything that has one.
pub(super) fn defaults(flags: &Flags) -> Layer {
    let slots = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let data_dir = default_data_dir(|name| std::env::var(name).ok(), nix::unistd::geteuid().is_root());
    let empty = || ValueKind::Array(Vec::new());
    let mut values: Vec<(&str, ValueKind)> = vec![
        ("data_dir", data_dir.display().to_string().into()),
        ("gateway.max_blob_bytes", "1GiB".into()),
        ("worker.name", worker_name().into()),
        ("worker.slots", u64::try_from(slots).unwrap_or(1).into()),
        ("worker.queues", vec!["default"].into()),
        ("worker.allow_host_layer", false.into()),
        ("worker.allowed_host_paths", empty()),
        ("worker.layer_dirs", empty()),
        ("worker.metric_labels", empty()),
        ("worker.scratch_memory_bytes", "256MiB".into()),
        ("worker.prepare_ahead", true.into()),
        ("worker.network_namespace", "fresh".into()),
        ("worker.max_input_bytes", "256MiB".into()),
        ("worker.max_archive_bytes", "256MiB".into()),
        ("worker.max_output_files", 10_000_u64.into()),
        ("worker.max_layer_bytes", "8GiB".into()),
        ("worker.max_layer_entries", 1_000_000_u64.into()),
        ("worker.pull_images", true.into()),
        ("worker.insecure_registries", Vec::<String>::new().into()),
        ("worker.egress.enabled", true.into()),
        ("worker.egress.allow", empty()),
        ("worker.egress.deny", empty()),
        ("worker.drain_grace", "30s".into()),
        ("worker.lease", "30s".into()),
        ("worker.prove", true.into()),
        ("worker.store_patience", "10m".into()),
    ];
    values.extend(flags.defaults.iter().cloned());
    Layer(values.into_iter().map(|(key, kind)| (key.to_owned(), kind, "default".to_owned())).collect())
}

/// `HUTCH__SECTION__KEY` of these variables.
pub(super) fn environment(variables: Vec<(String, String)>) -> Layer {
    let values = variables.into_iter().filter_map(|(name, text)| {
        let key = name.strip_prefix("HUTCH__")?.to_lowercase().replace("__", ".");
        let is_list = KEYS.iter().any(|known| known.list && known.path == key);
        let kind = if is_list {
            let items: Vec<String> =
                text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect();
            items.into()
        } else {
            text.into()
        };
        Some((key, kind, format!("env {name}")))
    });
    Layer(values.collect())
}

/// What the command line sets.
pub(super) fn flags(flags: &Flags) -> Layer {
    let values =
        flags.set.iter().map(|(key, kind, flag)| ((*key).to_owned(), kind.clone(), format!("flag {flag}")));
    Layer(values.collect())
}

/// The value of a key, which knows where it comes from.
pub(super) fn value<'a>(merged: &'a Config, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(&merged.cache, |value, part| match &value.kind {
        ValueKind::Table(table) => table.get(part),
        _ => None,
    })
}

/// A name that tells this worker from others: the host's, with a few digits of its own.
fn worker_name() -> String {
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let host: String = host
        .chars()
        .take_while(|c| *c != '.')
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(40)
        .collect();
    let host = host.trim_start_matches('-');
    format!("{}-{:x}", if host.is_empty() { "w" } else { host }, std::process::id())
}
