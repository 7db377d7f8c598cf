//! Export as a folder that Hugging Face's `transformers` loads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hgct_core::canonical::{self, Hash};
use hgct_core::dtype::DType;
use hgct_core::model::TensorSpec;
use hgct_core::slice::{Role, Slice};

use crate::disk::{Disk, OsDisk};
use crate::header::{self, Tensor};
use crate::local::ensure_dir;
use crate::{Checkpoint, Error, LocalStore, Result, Store as _};

const TOKENIZER_CONFIG: &str = "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\"\n}\n";

/// The tokenizer that goes with an export.
#[derive(Debug, Clone)]
pub struct ExportTokenizer {
    /// The `tokenizer.json`. It must be the one whose hash the manifest has, where it has one.
    pub path: PathBuf,
    /// Content of `tokenizer_config.json`; a minimal one where absent.
    pub config_json: Option<String>,
}

/// How an export is cut into files.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Bytes of tensors in a file, unless one tensor alone has more.
    pub max_file_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { max_file_bytes: 5_000_000_000 }
    }
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The folder.
    pub path: String,
    /// Its files.
    pub files: Vec<String>,
    /// Bytes of all tensors.
    pub size_bytes: u64,
}

/// Writes the parameters, `config.json` and the tokenizer into the folder `out`, which must be new
/// or empty and is complete once it is there. A tied embedding is stored once.
pub fn export_hf(
    checkpoint: &Checkpoint,
    tokenizer: Option<&ExportTokenizer>,
    out: &Path,
    options: &ExportOptions,
) -> Result<Exported> {
    let mut small = vec![("config.json", checkpoint.manifest().model.to_config_json().into_bytes())];
    if let Some(tokenizer) = tokenizer {
        let json = fs::read(&tokenizer.path).map_err(Error::io("read", &tokenizer.path))?;
        let found = Hash::of_bytes(&json);
        if let Some(expected) = checkpoint.manifest().tokenizer.as_ref().filter(|hash| **hash != found) {
            return Err(Error::Tokenizer {
                path: tokenizer.path.clone(),
                found: found.short().into(),
                expected: expected.short().into(),
            });
        }
        small.push(("tokenizer.json", json));
        let config = tokenizer.config_json.as_deref().unwrap_or(TOKENIZER_CONFIG);
        small.push(("tokenizer_config.json", config.into()));
    }
    export_on(&(Arc::new(OsDisk) as Arc<dyn Disk>), checkpoint, &small, out, options)
}

/// The export on any disk: into a folder beside `out`, which then takes its name.
fn export_on(
    disk: &Arc<dyn Disk>,
    checkpoint: &Checkpoint,
    small: &[(&str, Vec<u8>)],
    out: &Path,
    options: &ExportOptions,
) -> Result<Exported> {
    let manifest = checkpoint.manifest();
    let parameters = manifest.shards.iter().flat_map(|s| &s.entries).filter(|e| e.role == Role::Parameter);
    if let Some(other) = parameters.map(|entry| entry.dtype).find(|dtype| *dtype != DType::F32) {
        let (what, value) = ("export of dtype", other.name().into());
        return Err(hgct_core::Error::NotYet { what, value, instead: "f32" }.into());
    }
    let not_empty = || Error::NotEmpty { path: out.into() };
    let was_there = match disk.list(out) {
        Ok(entries) if entries.is_empty() => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Ok(_) => return Err(not_empty()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(not_empty()),
        Err(error) => return Err(Error::io("list", out)(error)),
    };
    let (Some(parent), Some(name)) = (out.parent(), out.file_name()) else { return Err(not_empty()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    ensure_dir(disk.as_ref(), parent)?;

    let temporary = parent.join(format!(".tmp-{}", name.to_string_lossy()));
    let store = LocalStore::on(disk.clone(), &temporary);
    // What an interrupted export left.
    remove_all(disk.as_ref(), &store)?;
    let written = write_files(&store, checkpoint, small, options).and_then(|exported| {
        if was_there {
            disk.remove_dir(out).map_err(Error::io("replace", out))?;
        }
        disk.rename(&temporary, out).map_err(Error::io("rename to", out))?;
        disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
        Ok(exported)
    });
    match written {
        Ok((files, size_bytes)) => Ok(Exported { path: out.display().to_string(), files, size_bytes }),
        Err(error) => {
            // The first error is the one to tell.
            let _ = remove_all(disk.as_ref(), &store);
            Err(error)
        }
    }
}

fn remove_all(disk: &dyn Disk, store: &LocalStore) -> Result<()> {
    store.remove_unfinished()?;
    for object in store.list()? {
        store.remove(&object.name)?;
    }
    match disk.remove_dir(store.root()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", store.root())),
    }
}

/// File names and the bytes of all tensors.
fn write_files(
    store: &LocalStore,
    checkpoint: &Checkpoint,
    small: &[(&str, Vec<u8>)],
    options: &ExportOptions,
) -> Result<(Vec<String>, u64)> {
    let mut names = Vec::new();
    let mut weight_map = BTreeMap::new();
    let mut size_bytes = 0;
    let files = cut(checkpoint.manifest().model.tensors(), options.max_file_bytes);
    for (index, tensors) in files.iter().enumerate() {
        let name = match files.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        write_tensors(store, checkpoint, &name, tensors)?;
        size_bytes += tensors.iter().map(bytes_of).sum::<u64>();
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        names.push(name);
    }
    let mut documents: Vec<(&str, Vec<u8>)> = small.to_vec();
    if files.len() > 1 {
        let index = serde_json::json!({"metadata": {"total_size": size_bytes}, "weight_map": weight_map});
        documents.push(("model.safetensors.index.json", canonical::encode(&index).into_bytes()));
    }
    for (name, content) in documents {
        let mut upload = store.create(name)?;
        upload.write(&content)?;
        upload.commit()?;
        names.push(name.to_owned());
    }
    names.sort();
    Ok((names, size_bytes))
}

fn write_tensors(
    store: &LocalStore,
    checkpoint: &Checkpoint,
    name: &str,
    tensors: &[TensorSpec],
) -> Result<()> {
    let headers: Vec<Tensor> = tensors
        .iter()
        .map(|tensor| Tensor {
            key: tensor.name.clone(),
            dtype: DType::F32,
            shape: tensor.shape.clone(),
            saved_offsets: None,
        })
        .collect();
    let wanted: Vec<(Slice, Role)> =
        tensors.iter().map(|tensor| (Slice::whole(tensor), Role::Parameter)).collect();
    let mut upload = store.create(name)?;
    upload.write(&header::encode(&headers, false))?;
    for piece in checkpoint.read_slices(&wanted)? {
        upload.write(&piece?.bytes)?;
    }
    upload.commit()
}

/// Tensors in order, into files of at most `max_bytes` or one tensor.
fn cut(tensors: Vec<TensorSpec>, max_bytes: u64) -> Vec<Vec<TensorSpec>> {
    let mut files: Vec<Vec<TensorSpec>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        let bytes = bytes_of(&tensor);
        match files.last_mut() {
            Some(file) if bytes <= room => file.push(tensor),
            _ => {
                room = max_bytes.max(bytes);
                files.push(vec![tensor]);
            }
        }
        room -= bytes;
    }
    files
}

fn bytes_of(tensor: &TensorSpec) -> u64 {
    tensor.num_elements() * DType::F32.size_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoints;
    use crate::fixture::{elements, halves, head, model, write};
    use crate::testing::{Faults, MemoryDisk};
    use hgct_core::model::{EMBEDDING, ModelSpec};
    use safetensors::SafeTensors;

    fn checkpoint(folder: &Path, tokenizer: Option<&[u8]>) -> Checkpoint {
        let checkpoints = Checkpoints::open(folder);
        let mut head = head(7, model());
        head.tokenizer = tokenizer.map(Hash::of_bytes);
        write(&checkpoints, head, halves(7, &model()), 2).unwrap();
        checkpoints.verify(7).unwrap()
    }

    /// Tensors of one exported file.
    fn read(path: &Path) -> Vec<(String, Vec<u8>)> {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensors().into_iter().map(|(name, tensor)| (name, tensor.data().to_vec())).collect()
    }

    #[test]
    fn the_folder_holds_every_tensor_once_and_the_models_documents() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(&folder.path().join("c"), Some(b"{}"));
        let path = folder.path().join("tokenizer.json");
        let tokenizer = ExportTokenizer { path: path.clone(), config_json: None };
        let out = folder.path().join("new/out");
        fs::write(&path, "{ }").unwrap();
        let error = export_hf(&checkpoint, Some(&tokenizer), &out, &ExportOptions::default()).unwrap_err();
        assert!(error.to_string().contains("is not the tokenizer of the checkpoint"), "{error}");

        fs::write(&path, "{}").unwrap();
        let exported = export_hf(&checkpoint, Some(&tokenizer), &out, &ExportOptions::default()).unwrap();
        let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(exported.files, files);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 4);
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert_eq!(ModelSpec::from_config_json("config.json", &config).unwrap(), model());
        let tensors = read(&out.join("model.safetensors"));
        assert_eq!(tensors.len(), model().tensors().len());
        assert_eq!(tensors.iter().filter(|(name, _)| name == EMBEDDING).count(), 1);
        for tensor in model().tensors() {
            let (_, found) = tensors.iter().find(|(name, _)| *name == tensor.name).unwrap();
            let expected = elements(7, &tensor, Role::Parameter, 0..tensor.rows());
            assert_eq!(*found, expected.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }

        // Into a folder with something in it: refused, and nothing is changed.
        let error = export_hf(&checkpoint, None, &out, &ExportOptions::default()).unwrap_err();
        assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
        let error = export_hf(&checkpoint, None, &path, &ExportOptions::default()).unwrap_err();
        assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_large_model_is_several_files_with_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(&folder.path().join("c"), None);
        // An empty folder is as good as none.
        let out = folder.path().join("out");
        fs::create_dir(&out).unwrap();
        let exported = export_hf(&checkpoint, None, &out, &ExportOptions { max_file_bytes: 1500 }).unwrap();
        let index = fs::read_to_string(out.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 4 * model().num_parameters());
        let files = exported.files.iter().filter(|name| name.starts_with("model-"));
        let mut count = 0;
        for file in files.clone() {
            assert!(file.ends_with(&format!("-of-{:05}.safetensors", files.clone().count())), "{file}");
            let tensors = read(&out.join(file));
            let bytes: usize = tensors.iter().map(|(_, data)| data.len()).sum();
            assert!(bytes <= 1500, "{file} has {bytes} bytes");
            assert!(tensors.iter().all(|(name, _)| index["weight_map"][name] == **file));
            count += tensors.len();
        }
        assert_eq!(count, model().tensors().len());
    }

    #[test]
    fn other_dtypes_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut checkpoint = checkpoint(&folder.path().join("c"), None);
        checkpoint.manifest.shards[1].entries[0].dtype = DType::Bf16;
        let error = export_hf(&checkpoint, None, &folder.path().join("out"), &ExportOptions::default());
        assert_eq!(error.unwrap_err().to_string(), "export of dtype bf16 is not supported yet: use f32");
    }

    #[test]
    fn a_disk_that_fails_at_any_change_leaves_no_half_export() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(folder.path(), None);
        let small = [("config.json", b"{}".to_vec())];
        let options = ExportOptions { max_file_bytes: 4000 };
        let export = |disk: &MemoryDisk| {
            export_on(
                &(Arc::new(disk.clone()) as Arc<dyn Disk>),
                &checkpoint,
                &small,
                "/a/out".as_ref(),
                &options,
            )
        };
        let whole = MemoryDisk::new();
        export(&whole).unwrap();
        let complete = |disk: &MemoryDisk| disk.files() == whole.files();
        for change in 1..=whole.changes() {
            let disk = MemoryDisk::new();
            disk.set_faults(Faults { no_space_from: Some(change), ..Faults::default() });
            match export(&disk) {
                Ok(_) => assert!(complete(&disk)),
                Err(error) => {
                    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
                    assert_eq!(disk.files(), []);
                }
            }
            for seed in 0..4 {
                let disk = MemoryDisk::new();
                disk.set_faults(Faults { power_loss_at: Some(change), ..Faults::default() });
                let done = export(&disk).is_ok();
                disk.restart(seed);
                let there = disk.files().iter().any(|(path, _)| path.starts_with("/a/out"));
                assert_eq!(there, complete(&disk));
                assert!(there || !done);
                if !there {
                    // What was left behind is no obstacle.
                    export(&disk).unwrap();
                    assert!(complete(&disk), "{:?}", disk.files());
                }
            }
        }
    }
}
