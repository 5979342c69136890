//! `hutch layer`: the images and layers that jobs may stack.
//!
//! Images and the bytes of layers are in the store, for every worker on it; unpacked layers are below this host's data.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use hutch_layers::{ImageName, Imported, LayerRecord, Layers, StoreError, TreeStore};
use hutch_proto::Digest;
use serde_json::json;

use crate::cli::LayerCommand;
use crate::privileges::Homes;
use crate::settings::{self, Flags, Settings};
use crate::term::Waiting;
use crate::{exit, queue, term, verdict};

/// The store that a command works on, made ready while there is one thread.
pub(crate) struct Shelf {
    settings: Settings,
    homes: Homes,
}

/// Makes it ready.
pub(crate) fn ready(command: &LayerCommand, config: Option<&Path>) -> anyhow::Result<Shelf> {
    let (LayerCommand::Import { store, .. }
    | LayerCommand::Pull { store, .. }
    | LayerCommand::List { store }
    | LayerCommand::Remove { store, .. }
    | LayerCommand::Gc { store, .. }) = command;
    let data = store.data_dir.as_ref().map(|path| path.display().to_string());
    let settings = settings::load(config, &Flags::default().set("data_dir", "--data", data))?.settings;
    let homes = Homes::of_command(&settings.data_dir, settings.store_directory())?;
    Ok(Shelf { settings, homes })
}

/// Does what the command says.
pub(crate) async fn layer(command: LayerCommand, shelf: anyhow::Result<Shelf>) -> anyhow::Result<ExitCode> {
    let Shelf { settings, homes } = shelf?;
    let blobs = queue::store(&settings, &homes)?;
    let trees = queue::trees(&settings)?;
    let layers = queue::layers(&blobs, Arc::new(trees.clone()), queue::registries_for_jobs(&settings)?);
    let done = perform(command, &settings, &layers, &trees.store).await;
    homes.give_back();
    done
}

async fn perform(
    command: LayerCommand,
    settings: &Settings,
    layers: &Layers,
    trees: &TreeStore,
) -> anyhow::Result<ExitCode> {
    match command {
        LayerCommand::Import { path, name, store } => {
            import(layers, &path, name.as_deref(), store.json).await
        }
        LayerCommand::Pull { image, store } => pull(settings, layers, &image, store.json).await,
        LayerCommand::List { store } => list(layers, store.json).await,
        LayerCommand::Remove { names, .. } => remove(layers, trees, &names).await,
        LayerCommand::Gc { older_than, max_bytes, store } => {
            let most = max_bytes.map_or(u64::MAX, |size| size.as_u64());
            gc(trees, *older_than, most, store.json)
        }
    }
}

fn name_of(text: &str) -> anyhow::Result<ImageName> {
    text.strip_prefix("image:").unwrap_or(text).parse().map_err(|error: String| anyhow!(error))
}

fn full(error: StoreError) -> anyhow::Error {
    anyhow!(error.full())
}

async fn import(layers: &Layers, path: &Path, name: Option<&str>, as_json: bool) -> anyhow::Result<ExitCode> {
    let name = name.map(name_of).transpose()?;
    if !path.exists() {
        bail!("there is no {}", path.display());
    }
    let importing = layers.import(path, name.as_ref());
    tokio::pin!(importing);
    let mut waiting = Waiting::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let imported = loop {
        tokio::select! {
            imported = &mut importing => break imported.map_err(full)?,
            _ = ticks.tick() => waiting.show(format_args!("importing {}", path.display())),
        }
    };
    waiting.clear();
    for one in imported {
        match one {
            Imported::Image(image) if as_json => {
                term::line(json!({"image": image.name, "layers": image.layers}));
            }
            Imported::Image(image) => term::line(format!("image:{}", image.name)),
            Imported::Layer(layer) if as_json => {
                term::line(json!({"layer": layer.diff_id, "bytes": layer.bytes}))
            }
            Imported::Layer(layer) => term::line(layer.diff_id),
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn pull(settings: &Settings, layers: &Layers, image: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let name = name_of(image)?;
    let registries = queue::registries(settings)?;
    let waiting = std::sync::Mutex::new(Waiting::new());
    let progress = |done: usize, all: usize| {
        let mut waiting = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        waiting.show(format_args!("pulling {name}: {done} of {all} layers"));
    };
    let pulled = layers.pull(&name, &registries, &progress).await;
    drop(waiting);
    let record = pulled.map_err(full)?;
    if as_json {
        term::line(json!({"image": record.name, "layers": record.layers}));
    } else {
        term::line(format!("image:{}", record.name));
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(layers: &Layers, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut images = layers.catalog().images().await.map_err(full)?;
    images.sort_by(|a, b| a.name.cmp(&b.name));
    let mut records = layers.catalog().layers().await.map_err(full)?;
    records.sort_by(|a, b| a.diff_id.hex().cmp(b.diff_id.hex()));
    let unpacked = |layer: &LayerRecord| layers.trees().facts(&layer.diff_id);
    if as_json {
        let images: Vec<_> =
            images.iter().map(|image| json!({"image": image.name, "layers": image.layers})).collect();
        let records: Vec<_> = records
            .iter()
            .map(|layer| {
                let facts = unpacked(layer);
                json!({"layer": layer.diff_id, "bytes": layer.bytes, "unpacked_bytes": facts.map(|facts| facts.bytes)})
            })
            .collect();
        term::line(json!({"images": images, "layers": records}));
        return Ok(ExitCode::SUCCESS);
    }
    for image in &images {
        term::line(format!("image:{}  {} layers", image.name, image.layers.len()));
    }
    for layer in &records {
        let here = if unpacked(layer).is_some() { "" } else { "  not unpacked here" };
        term::line(format!("{}  {:>10}{here}", layer.diff_id, verdict::size(layer.bytes)));
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(layers: &Layers, trees: &TreeStore, names: &[String]) -> anyhow::Result<ExitCode> {
    let mut missing = false;
    for name in names {
        if let Ok(digest) = name.parse::<Digest>() {
            missing |= !remove_layer(layers, trees, &digest).await?;
            continue;
        }
        let image = name_of(name)?;
        if layers.catalog().image(&image).await.map_err(full)?.is_none() {
            term::note(format!("there is no image {image}"));
            missing = true;
            continue;
        }
        layers.catalog().forget_image(&image.to_string()).await.map_err(full)?;
    }
    Ok(if missing { ExitCode::from(exit::FAILURE) } else { ExitCode::SUCCESS })
}

/// Removes a layer that no image has; whether it was there.
async fn remove_layer(layers: &Layers, trees: &TreeStore, digest: &Digest) -> anyhow::Result<bool> {
    let images = layers.catalog().images().await.map_err(full)?;
    if let Some(image) = images.iter().find(|image| image.layers.contains(digest)) {
        bail!("the image {} has the layer {digest}: remove the image first", image.name);
    }
    let known = layers.catalog().layer(digest).await.map_err(full)?.is_some();
    layers.catalog().forget_layer(digest).await.map_err(full)?;
    let unpacked = trees.facts(digest).is_some();
    if unpacked && !trees.remove(digest).context("the layer cannot be removed")? {
        bail!("a running job uses the layer {digest}");
    }
    if !known && !unpacked {
        term::note(format!("there is no layer {digest}"));
    }
    Ok(known || unpacked)
}

/// Removes unpacked layers, the longest unused first; what running jobs use stays.
fn gc(trees: &TreeStore, older_than: Duration, most: u64, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut kept = trees.list().context("the layers cannot be listed")?;
    kept.sort_by_key(|(_, _, used)| *used);
    let mut bytes: u64 = kept.iter().map(|(_, facts, _)| facts.bytes).sum();
    let now = SystemTime::now();
    let (mut removed, mut freed) = (0_u64, 0_u64);
    for (digest, facts, used) in kept {
        let age = now.duration_since(used).unwrap_or_default();
        if age < older_than && bytes <= most {
            continue;
        }
        if trees.remove(&digest).context("a layer cannot be removed")? {
            bytes -= facts.bytes;
            freed += facts.bytes;
            removed += 1;
        }
    }
    if as_json {
        term::line(json!({"removed": removed, "freed_bytes": freed}));
    } else {
        term::line(format!("{removed} layers removed, {}", verdict::size(freed)));
    }
    Ok(ExitCode::SUCCESS)
}
