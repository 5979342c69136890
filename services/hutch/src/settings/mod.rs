//! What is set, and by whom: defaults, then a file, then the environment, then flags.
//!
//! 1. The layers are merged by the `config` crate; every value remembers where it comes from.
//! 2. A key that nothing reads is an error that names it, and the key that was likely meant.
//! 3. The rest is read into [`Settings`], and `data_dir` made absolute: no one after this sees a relative one.

mod check;
mod keys;
mod limits;
mod show;
mod source;

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use config::{Config, File, FileFormat, Value};
use hutch_proto::units::{ByteSize, Millis};
use hutch_proto::{LimitPolicy, SeccompSpec};
use hutch_sandbox::{EgressConfig, EgressRule, NetworkNamespace};
use serde::Deserialize;

pub(crate) use show::show;
pub(crate) use source::Flags;

use limits::LimitTable;

/// Where a config file is looked for when none is named.
const PLACES: [&str; 2] = ["hutch.toml", "/etc/hutch/hutch.toml"];

/// Everything that can be set.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Settings {
    /// Where `up`, `worker` and `gateway` listen; each has its own default.
    pub(crate) listen: Option<String>,
    /// Where everything is kept; absolute.
    pub(crate) data_dir: PathBuf,
    pub(crate) worker: WorkerSettings,
    #[serde(default)]
    pub(crate) broker: BrokerSettings,
    #[serde(default)]
    pub(crate) store: StoreSettings,
    pub(crate) gateway: GatewaySettings,
}

/// `[worker]`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct WorkerSettings {
    pub(crate) name: String,
    pub(crate) slots: u32,
    pub(crate) queues: Vec<String>,
    pub(crate) allow_host_layer: bool,
    pub(crate) allowed_host_paths: Vec<PathBuf>,
    pub(crate) layer_dirs: Vec<PathBuf>,
    pub(crate) metric_labels: Vec<String>,
    pub(crate) scratch_memory_bytes: ByteSize,
    pub(crate) prepare_ahead: bool,
    pub(crate) network_namespace: NetworkNamespace,
    pub(crate) max_input_bytes: ByteSize,
    pub(crate) max_archive_bytes: ByteSize,
    pub(crate) max_output_files: usize,
    pub(crate) max_layer_bytes: ByteSize,
    pub(crate) max_layer_entries: u64,
    pub(crate) pull_images: bool,
    pub(crate) insecure_registries: Vec<String>,
    pub(crate) registry_logins: Option<PathBuf>,
    #[serde(default)]
    pub(crate) seccomp: SeccompSpec,
    pub(crate) egress: EgressSettings,
    pub(crate) prove: bool,
    pub(crate) drain_grace: Millis,
    pub(crate) lease: Millis,
    pub(crate) store_patience: Millis,
    #[serde(default)]
    pub(crate) max_limits: LimitTable,
    #[serde(default)]
    pub(crate) default_limits: LimitTable,
}

/// `[worker.egress]`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct EgressSettings {
    pub(crate) enabled: bool,
    pub(crate) allow: Vec<String>,
    pub(crate) deny: Vec<String>,
}

/// `[broker]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct BrokerSettings {
    /// `amqp://…`; the embedded queue if left out.
    pub(crate) url: Option<String>,
}

/// `[store]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct StoreSettings {
    /// `file:///…`; below the data directory if left out.
    pub(crate) url: Option<String>,
}

/// `[gateway]`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct GatewaySettings {
    pub(crate) tokens_file: Option<PathBuf>,
    pub(crate) max_blob_bytes: ByteSize,
}

/// The settings, and where each value comes from.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) settings: Settings,
    merged: Config,
    file: Option<PathBuf>,
}

impl Settings {
    /// The limits of this worker.
    pub(crate) fn limits(&self) -> anyhow::Result<LimitPolicy> {
        limits::policy(&self.worker.default_limits, &self.worker.max_limits)
    }

    /// Which jobs have a way out, and how far.
    pub(crate) fn egress(&self) -> anyhow::Result<EgressConfig> {
        let EgressSettings { enabled, allow, deny } = &self.worker.egress;
        let rules = |key: &str, list: &[String]| {
            let parsed = list.iter().map(|rule| rule.parse::<EgressRule>());
            parsed.collect::<Result<_, _>>().map_err(|error| anyhow!("worker.egress.{key}: {error}"))
        };
        Ok(EgressConfig { enabled: *enabled, allow: rules("allow", allow)?, deny: rules("deny", deny)? })
    }

    /// The store's directory, if it is one that is set.
    pub(crate) fn store_directory(&self) -> Option<&Path> {
        self.store.url.as_deref().and_then(|url| url.strip_prefix("file://")).map(Path::new)
    }
}

/// Reads all layers.
pub(crate) fn load(file: Option<&Path>, flags: &Flags) -> anyhow::Result<Loaded> {
    load_with(file, std::env::vars().collect(), flags)
}

fn load_with(
    file: Option<&Path>,
    environment: Vec<(String, String)>,
    flags: &Flags,
) -> anyhow::Result<Loaded> {
    let file = find(file)?;
    let mut layers = Config::builder().add_source(source::defaults(flags));
    if let Some(path) = &file {
        layers = layers.add_source(File::from(path.as_path()).format(FileFormat::Toml));
    }
    let merged = layers
        .add_source(source::environment(environment))
        .add_source(source::flags(flags))
        .build()
        .map_err(|error| anyhow!("the config cannot be read: {error}"))?;
    let mut settings = read(&merged)?;
    settings.data_dir = absolute(&settings.data_dir)?;
    check::check(&settings)?;
    Ok(Loaded { settings, merged, file })
}

/// The config file, if there is one.
fn find(named: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    match named {
        Some(path) if path.is_file() => Ok(Some(path.to_owned())),
        Some(path) => bail!("there is no config file {}", path.display()),
        None => Ok(PLACES.iter().map(PathBuf::from).find(|path| path.is_file())),
    }
}

/// Reads the merged layers; a key that nothing reads is an error.
fn read(merged: &Config) -> anyhow::Result<Settings> {
    let mut unknown = Vec::new();
    let settings = serde_ignored::deserialize(merged.clone(), |path| unknown.push(path.to_string()));
    if let Some(key) = unknown.first() {
        let from = source::value(merged, key)
            .and_then(Value::origin)
            .map(|origin| format!(" in {origin}"))
            .unwrap_or_default();
        let meant = keys::nearest(key).map(|near| format!(": `{near}` is likely meant")).unwrap_or_default();
        bail!("unknown key `{key}`{from}{meant}; `hutch config show` lists all keys");
    }
    settings.map_err(|error| anyhow!("the config is wrong: {error}"))
}

/// The data directory when none is set: `/var/lib/hutch` as root, else below the user's state.
fn default_data_dir(variable: impl Fn(&str) -> Option<String>, root: bool) -> PathBuf {
    if root {
        return PathBuf::from("/var/lib/hutch");
    }
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .unwrap_or_else(std::env::temp_dir)
        .join("hutch")
}

/// The data directory made absolute, from the directory that this command was started in: the address of the store
/// and the mounts of jobs are made of it.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| {
        format!("data_dir: `{}` is no path: a directory such as /var/lib/hutch is expected", path.display())
    })
}

#[cfg(test)]
mod tests;
