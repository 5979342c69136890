//! Images from registries, by the OCI distribution specification.
//!
//! In order: the manifest for this machine, its config, and each layer that is not known yet, several at a time;
//! every blob is checked against its digest on the way, every layer against its diff id. The image is recorded last.

use std::time::Duration;

use oci_client::Client;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;

use hutch_proto::Digest;
use tokio::task::JoinSet;

use crate::StoreError;
use crate::catalog::{ImageRecord, LayerRecord};
use crate::image::{ConfigFile, ImageName};
use crate::layers::Layers;

/// How many layers come at one time.
const AT_ONCE: usize = 4;
/// How long a registry may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// How registries are spoken to.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Who asks where, by registry: a user's name and password.
    pub logins: Vec<(String, (String, String))>,
    /// Registries without TLS; those of this machine (`localhost`, `127.0.0.1`) are taken for such.
    pub insecure: Vec<String>,
}

impl Registries {
    /// The logins of a Docker config file (`~/.docker/config.json`); those that a credential helper keeps are left out.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn with_docker_config(mut self, text: &str) -> Result<Self, String> {
        use base64::Engine as _;
        #[derive(serde::Deserialize)]
        struct File {
            #[serde(default)]
            auths: std::collections::BTreeMap<String, Auth>,
        }
        #[derive(serde::Deserialize)]
        struct Auth {
            auth: Option<String>,
        }
        let file: File = serde_json::from_str(text).map_err(|e| e.to_string())?;
        for (registry, Auth { auth }) in file.auths {
            let Some(auth) = auth else { continue };
            let plain =
                base64::engine::general_purpose::STANDARD.decode(auth.trim()).map_err(|e| e.to_string())?;
            let plain = String::from_utf8(plain).map_err(|e| e.to_string())?;
            let (user, password) = plain.split_once(':').ok_or("an `auth` without a colon")?;
            let registry =
                registry.trim_start_matches("https://").split('/').next().unwrap_or_default().to_owned();
            self.logins.push((registry, (user.to_owned(), password.to_owned())));
        }
        Ok(self)
    }

    fn auth(&self, registry: &str) -> RegistryAuth {
        let same = |known: &str| known == registry || (known == "index.docker.io" && registry == "docker.io");
        match self.logins.iter().find(|(known, _)| same(known)) {
            Some((_, (user, password))) => RegistryAuth::Basic(user.clone(), password.clone()),
            None => RegistryAuth::Anonymous,
        }
    }

    fn client(&self, registry: &str) -> Client {
        // Whoever was first has installed the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let host = registry.split(':').next().unwrap_or_default();
        let plain =
            matches!(host, "localhost" | "127.0.0.1") || self.insecure.iter().any(|known| known == registry);
        Client::new(ClientConfig {
            protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
            read_timeout: Some(SILENCE),
            connect_timeout: Some(Duration::from_secs(20)),
            user_agent: concat!("hutch/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
    }
}

impl Layers {
    /// Fetches an image from its registry, and keeps it under its name. `progress` is told of each layer that is there:
    /// how many of how many.
    ///
    /// # Errors
    /// [`StoreError::Registry`], [`StoreError::Image`]; what failed else.
    pub async fn pull(
        &self,
        name: &ImageName,
        registries: &Registries,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<ImageRecord, StoreError> {
        let reference = name.reference();
        let client = registries.client(reference.resolve_registry());
        let auth = registries.auth(reference.registry());
        let (manifest, _, config) = client
            .pull_manifest_and_config(reference, &auth)
            .await
            .map_err(|e| failed(format!("pull {name}"), &e))?;
        let config: ConfigFile = serde_json::from_str(&config)
            .map_err(|e| StoreError::Image(format!("the config of {name}: {e}")))?;
        let diff_ids = config.diff_ids().to_vec();
        if diff_ids.len() != manifest.layers.len() {
            let (named, there) = (diff_ids.len(), manifest.layers.len());
            return Err(StoreError::Image(format!(
                "{name}: its config names {named} layers, its manifest {there}"
            )));
        }
        let all = diff_ids.len();
        progress(0, all);
        let mut missing = diff_ids.iter().cloned().zip(manifest.layers);
        let mut pulls = JoinSet::new();
        for done in 1..=all {
            while pulls.len() < AT_ONCE
                && let Some((diff_id, layer)) = missing.next()
            {
                let (layers, client, name) = (self.clone(), client.clone(), name.clone());
                pulls.spawn(async move { layers.pull_layer(&client, &name, &diff_id, &layer).await });
            }
            let lost =
                |e| StoreError::Transfer { operation: "a pull was lost", source: std::io::Error::other(e) };
            pulls.join_next().await.transpose().map_err(lost)?.transpose()?;
            progress(done, all);
        }
        let record = ImageRecord { name: name.to_string(), layers: diff_ids, config: config.image_config() };
        self.catalog().put_image(&record).await?;
        Ok(record)
    }

    async fn pull_layer(
        &self,
        client: &Client,
        name: &ImageName,
        diff_id: &Digest,
        layer: &OciDescriptor,
    ) -> Result<(), StoreError> {
        let blob: Digest =
            layer.digest.parse().map_err(|e| StoreError::Image(format!("a layer of {name}: {e}")))?;
        let known = self.catalog().layer(diff_id).await?;
        if known.is_some_and(|known| known.blob == blob) && self.catalog().blobs().exists(&blob).await? {
            return Ok(());
        }
        let stream = client
            .pull_blob_stream(name.reference(), layer)
            .await
            .map_err(|e| failed(format!("pull a layer of {name}"), &e))?;
        let most = u64::try_from(layer.size).unwrap_or(0);
        let stored = self.catalog().blobs().put_stream(stream.stream, most).await?;
        if stored.digest != blob {
            return Err(StoreError::Damaged { expected: blob, found: stored.digest });
        }
        let record = LayerRecord { diff_id: diff_id.clone(), blob: stored.digest, bytes: stored.bytes };
        self.unpack_blob(&record).await?;
        self.catalog().put_layer(&record).await
    }
}

fn failed(operation: String, error: &OciDistributionError) -> StoreError {
    let transient = match error {
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code >= 500 || *code == 429,
        _ => false,
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    StoreError::Registry { operation, message, transient }
}
