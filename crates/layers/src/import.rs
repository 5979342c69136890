//! Layers and images from files: an OCI image layout (a directory, or a tar of one), a Docker archive, or the tar of
//! a root file system, compressed or not.
//!
//! In order: a tar is looked through for `manifest.json` (Docker) or `index.json` (OCI); its members are taken out into a
//! directory that is removed afterwards, plain files and links among them alone; the manifest says which of them
//! are layers; each layer is unpacked, checked against the diff id that the config names, and kept. The image is recorded last.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use hutch_proto::Digest;
use serde::Deserialize;

use crate::StoreError;
use crate::catalog::{ImageRecord, LayerRecord};
use crate::image::{ConfigFile, ImageName};
use crate::layers::{Layers, blocking};

/// The largest manifest or config that is read.
const MOST_JSON_BYTES: u64 = 4 << 20;
/// The most members of an archive.
const MOST_MEMBERS: usize = 10_000;

/// What an import brought.
#[derive(Debug, Clone)]
pub enum Imported {
    /// An image under a name.
    Image(ImageRecord),
    /// A layer alone.
    Layer(LayerRecord),
}

/// An image in a directory, before it is kept.
struct Found {
    names: Vec<String>,
    config: ConfigFile,
    layers: Vec<PathBuf>,
}

impl Layers {
    /// Imports a file or directory. `name` takes the place of the names that an image brings; the tar of a root file system
    /// becomes an image only if it is given.
    ///
    /// # Errors
    /// [`StoreError::Image`] for what cannot be used; what failed else.
    pub async fn import(&self, path: &Path, name: Option<&ImageName>) -> Result<Vec<Imported>, StoreError> {
        if path.is_dir() {
            return self.keep_found(read_layout(path)?, name).await;
        }
        let (file, spool) = (path.to_owned(), self.catalog().blobs().spool().to_owned());
        let work = move || take_out(&file, &spool);
        match blocking(work).await.map_err(|e| unreadable(path, &e))? {
            Some(members) if members.path().join("index.json").is_file() => {
                self.keep_found(read_layout(members.path())?, name).await
            }
            Some(members) => self.keep_found(read_docker(members.path())?, name).await,
            None => self.import_tree(path, name).await,
        }
    }

    /// The tar of a root file system.
    async fn import_tree(&self, path: &Path, name: Option<&ImageName>) -> Result<Vec<Imported>, StoreError> {
        let file = File::open(path).map_err(|e| unreadable(path, &e))?;
        let layer = self.keep(None, file).await?;
        let Some(name) = name else { return Ok(vec![Imported::Layer(layer)]) };
        let record = ImageRecord {
            name: name.to_string(),
            layers: vec![layer.diff_id],
            config: crate::image::ImageConfig::default(),
        };
        self.catalog().put_image(&record).await?;
        Ok(vec![Imported::Image(record)])
    }

    async fn keep_found(
        &self,
        found: Vec<Found>,
        name: Option<&ImageName>,
    ) -> Result<Vec<Imported>, StoreError> {
        let mut imported = Vec::new();
        if name.is_some() && found.len() > 1 {
            return Err(StoreError::Image(format!(
                "there are {} images in it: one name is not enough",
                found.len()
            )));
        }
        for Found { names, config, layers } in found {
            let diff_ids = config.diff_ids().to_vec();
            if diff_ids.len() != layers.len() {
                let message =
                    format!("its config names {} layers, its manifest {}", diff_ids.len(), layers.len());
                return Err(StoreError::Image(message));
            }
            for (diff_id, layer) in diff_ids.iter().zip(&layers) {
                let file = File::open(layer).map_err(|e| unreadable(layer, &e))?;
                self.keep(Some(diff_id.clone()), file).await?;
            }
            let names = match name {
                Some(name) => vec![name.to_string()],
                None => names
                    .iter()
                    .map(|name| name.parse::<ImageName>().map(|name| name.to_string()))
                    .collect::<Result<_, _>>()
                    .map_err(StoreError::Image)?,
            };
            if names.is_empty() {
                return Err(StoreError::Image(
                    "the image in it has no name: give one with --name".to_owned(),
                ));
            }
            let config = config.image_config();
            for name in names {
                let record = ImageRecord { name, layers: diff_ids.clone(), config: config.clone() };
                self.catalog().put_image(&record).await?;
                imported.push(Imported::Image(record));
            }
        }
        Ok(imported)
    }
}

/// Takes the members of an image archive out into a directory; none if it is no image archive.
fn take_out(path: &Path, spool: &Path) -> io::Result<Option<tempfile::TempDir>> {
    let open = || hutch_trees::decompressed(File::open(path)?).map(tar::Archive::new);
    let mut is_image = false;
    for (count, entry) in open()?.entries()?.enumerate() {
        let entry = entry?;
        let name = entry.path_bytes();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        is_image |= matches!(name, b"manifest.json" | b"index.json");
        // A root file system has far more, and neither of the two at its top.
        if is_image || count > MOST_MEMBERS {
            break;
        }
    }
    if !is_image {
        return Ok(None);
    }
    let dir = tempfile::tempdir_in(spool)?;
    let mut links = HashMap::new();
    for (count, entry) in open()?.entries()?.enumerate() {
        let mut entry = entry?;
        if count > MOST_MEMBERS {
            return Err(io::Error::other(format!("more than {MOST_MEMBERS} members")));
        }
        let Some(place) = below(dir.path(), &entry.path()?) else {
            return Err(io::Error::other("a member that leads out of the archive"));
        };
        match entry.header().entry_type() {
            tar::EntryType::Regular => {
                fs::create_dir_all(place.parent().unwrap_or(dir.path()))?;
                io::copy(&mut entry, &mut File::create_new(&place)?)?;
            }
            // Docker links layers that are in it twice.
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                let base = if entry.header().entry_type() == tar::EntryType::Link {
                    PathBuf::new()
                } else {
                    place
                        .strip_prefix(dir.path())
                        .ok()
                        .and_then(Path::parent)
                        .unwrap_or(Path::new(""))
                        .to_owned()
                };
                links.insert(place, base.join(target));
            }
            _ => {}
        }
    }
    for (place, target) in links {
        if let Some(target) = below(dir.path(), &target)
            && fs::symlink_metadata(&target).is_ok_and(|meta| meta.is_file())
        {
            fs::create_dir_all(place.parent().unwrap_or(dir.path()))?;
            fs::hard_link(target, place)?;
        }
    }
    Ok(Some(dir))
}

/// A path below a directory; none if it leads out of it. `a/../b` is `b`: no link is in the way, since none is made.
fn below(dir: &Path, path: &Path) -> Option<PathBuf> {
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => names.push(name),
            Component::ParentDir => drop(names.pop()?),
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(names.into_iter().fold(dir.to_owned(), |path, name| path.join(name)))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn read_docker(dir: &Path) -> Result<Vec<Found>, StoreError> {
    let manifests: Vec<DockerManifest> = json(&dir.join("manifest.json"))?;
    let member = |name: &str| {
        below(dir, Path::new(name))
            .ok_or_else(|| StoreError::Image(format!("`{name}` leads out of the archive")))
    };
    manifests
        .into_iter()
        .map(|manifest| {
            Ok(Found {
                names: manifest.repo_tags.unwrap_or_default(),
                config: json(&member(&manifest.config)?)?,
                layers: manifest.layers.iter().map(|layer| member(layer)).collect::<Result<_, _>>()?,
            })
        })
        .collect()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: HashMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

fn read_layout(dir: &Path) -> Result<Vec<Found>, StoreError> {
    let index: Index = json(&dir.join("index.json"))?;
    index.manifests.iter().map(|descriptor| read_manifest(dir, descriptor, 0)).collect()
}

fn read_manifest(dir: &Path, descriptor: &Descriptor, depth: u8) -> Result<Found, StoreError> {
    let blob = |digest: &Digest| dir.join("blobs/sha256").join(digest.hex());
    if descriptor.media_type.ends_with("index.v1+json")
        || descriptor.media_type.ends_with("manifest.list.v2+json")
    {
        let index: Index = json(&blob(&descriptor.digest))?;
        let ours = |entry: &&Descriptor| {
            entry.platform.as_ref().is_none_or(|p| p.os == "linux" && p.architecture == architecture())
        };
        return match index.manifests.iter().find(ours) {
            Some(entry) if depth < 4 => {
                let mut found = read_manifest(dir, entry, depth + 1)?;
                found.names.extend(names(descriptor));
                Ok(found)
            }
            _ => Err(StoreError::Image(format!("no image in it is for linux/{}", architecture()))),
        };
    }
    let manifest: Manifest = json(&blob(&descriptor.digest))?;
    Ok(Found {
        names: names(descriptor).into_iter().collect(),
        config: json(&blob(&manifest.config.digest))?,
        layers: manifest.layers.iter().map(|layer| blob(&layer.digest)).collect(),
    })
}

/// A name by annotation. skopeo and umoci write a tag alone there, which names nothing.
fn names(descriptor: &Descriptor) -> Option<String> {
    let name = ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
        .iter()
        .find_map(|key| descriptor.annotations.get(*key))?;
    name.contains(['/', ':']).then(|| name.clone())
}

/// This machine's architecture, as images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(MOST_JSON_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let shown = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = read().map_err(|e| StoreError::Image(format!("{} cannot be read: {e}", shown())))?;
    serde_json::from_slice(&bytes).map_err(|e| StoreError::Image(format!("{}: {e}", shown())))
}

fn unreadable(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Image(format!("{} cannot be read: {error}", path.display()))
}
