//! The header of a safetensors file: 8 bytes of length, JSON, then the data.
//!
//! Written so that plain readers, `transformers` and PyTorch's distributed checkpoint
//! (`HuggingFaceStorageReader`, which reads row cuts from `DCP_SHARDING_INFO`) all load it; parsed
//! as a stranger's.

use std::collections::BTreeMap;
use std::path::Path;

use hgct_core::dtype::DType;
use serde::{Deserialize, Serialize};

use crate::store::Object;
use crate::{Error, Result};

/// A longer header is refused unread. About 15,000 tensors fit.
pub(crate) const MAX_HEADER_BYTES: u64 = 4 << 20;

const METADATA: &str = "__metadata__";

/// One tensor of a file to be written.
pub(crate) struct Tensor {
    pub(crate) key: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// Where it begins in the whole tensor, for PyTorch's distributed checkpoint. Without it that
    /// reader refuses the file.
    pub(crate) saved_offsets: Option<Vec<u64>>,
}

impl Tensor {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size_bytes()
    }
}

/// Where a tensor is in a file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// First byte in the file.
    pub(crate) begin: u64,
}

#[derive(Serialize, Deserialize)]
struct TensorInfo {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Serialize)]
#[serde(untagged)]
enum Item {
    Metadata(BTreeMap<&'static str, String>),
    Tensor(TensorInfo),
}

#[derive(Serialize)]
struct Saved<'a> {
    saved_offsets: &'a [u64],
}

#[derive(Deserialize)]
struct Parsed {
    #[serde(rename = "__metadata__", default)]
    _metadata: BTreeMap<String, String>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorInfo>,
}

/// The header of a file that holds `tensors` one after another, as a multiple of 8 bytes.
/// `sharded` adds what PyTorch's distributed checkpoint wants.
pub(crate) fn encode(tensors: &[Tensor], sharded: bool) -> Vec<u8> {
    let mut metadata = BTreeMap::from([("format", "pt".to_owned())]);
    if sharded {
        let saved: BTreeMap<&str, Saved<'_>> = tensors
            .iter()
            .filter_map(|t| Some((t.key.as_str(), Saved { saved_offsets: t.saved_offsets.as_deref()? })))
            .collect();
        metadata.insert("DCP_VERSION", "1.0".into());
        metadata.insert("DCP_SHARDING_INFO", json(&saved));
    }
    let mut items = BTreeMap::from([(METADATA, Item::Metadata(metadata))]);
    let mut at = 0;
    for tensor in tensors {
        let end = at + tensor.size_bytes();
        let info = TensorInfo {
            dtype: safetensors_name(tensor.dtype).into(),
            shape: tensor.shape.clone(),
            data_offsets: (at, end),
        };
        items.insert(&tensor.key, Item::Tensor(info));
        at = end;
    }
    let mut text = json(&items).into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// Reads and checks a file's header: the tensors fill the data without gap or overlap, and the
/// file ends with the last. `path` is only named in errors.
pub(crate) fn read(object: &mut dyn Object, path: &Path) -> Result<BTreeMap<String, Found>> {
    let size = object.size_bytes();
    let fail = |reason: String| Error::damaged(path, format!("safetensors header: {reason}"));
    let mut length = [0; 8];
    object.read_range(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size.saturating_sub(8) {
        return Err(fail(format!("says that it has {length} bytes in a file of {size}")));
    }
    let mut text = vec![0; length as usize];
    object.read_range(8, &mut text)?;
    let parsed: Parsed = serde_json::from_slice(&text).map_err(|error| fail(error.to_string()))?;

    let mut by_place: Vec<(String, TensorInfo)> = parsed.tensors.into_iter().collect();
    by_place.sort_by_key(|(_, info)| info.data_offsets);
    let data = 8 + length;
    let mut next = 0;
    let mut found = BTreeMap::new();
    for (key, TensorInfo { dtype, shape, data_offsets: (begin, end) }) in by_place {
        let Some(known) = dtype_of(&dtype) else {
            return Err(fail(format!("{key:?} has the unknown dtype {dtype:?}")));
        };
        let bytes = shape.iter().try_fold(known.size_bytes(), |n, dim| n.checked_mul(*dim));
        if begin != next || bytes.is_none_or(|bytes| begin.checked_add(bytes) != Some(end)) {
            return Err(fail(format!(
                "{key:?} {dtype} {shape:?} is at {begin}..{end}, where byte {next} comes next"
            )));
        }
        next = end;
        if data.checked_add(end).is_none_or(|end| end > size) {
            return Err(fail(format!("{key:?} ends past the file's {size} bytes")));
        }
        found.insert(key, Found { dtype: known, shape, begin: data + begin });
    }
    if data + next != size {
        return Err(fail(format!("its tensors end at byte {} of {size}", data + next)));
    }
    Ok(found)
}

fn json<T: Serialize>(value: &T) -> String {
    // Maps with string keys of strings and integers always encode.
    serde_json::to_string(value).unwrap_or_default()
}

fn safetensors_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "F64",
        DType::F16 => "F16",
        DType::Bf16 => "BF16",
        DType::F8E4m3 => "F8_E4M3",
        DType::I32 => "I32",
        _ => "F32",
    }
}

fn dtype_of(name: &str) -> Option<DType> {
    [DType::F32, DType::F16, DType::Bf16, DType::F8E4m3, DType::F64, DType::I32]
        .into_iter()
        .find(|dtype| safetensors_name(*dtype) == name)
}
