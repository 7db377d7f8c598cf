//! The owner's side: slices in, safetensors bytes out, in pieces.

use std::collections::{BTreeMap, VecDeque};

use hgct_core::canonical::Hash;
use hgct_core::dtype::DType;
use hgct_core::ids::Rank;
use hgct_core::manifest::{ShardEnd, ShardEntry};
use hgct_core::slice::{Role, Slice};
use sha2::{Digest as _, Sha256};

use crate::header::{self, Tensor};
use crate::{CHUNK_BYTES, Error, Result};

/// Name of a rank's shard.
pub fn shard_file(rank: Rank) -> String {
    format!("shard-r{}.safetensors", rank.0)
}

/// Where a piece lies in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// First byte.
    pub offset: u64,
    /// Whether it is the shard's last.
    pub last: bool,
}

/// Turns slices of f32 into the bytes of one safetensors file, without the file in memory.
///
/// Keys are the tensor's name for parameters and `NAME#m`, `NAME#v` for other roles. Adjacent row
/// ranges of one tensor become one entry. Ranges with a gap between them have `@ROW` added, and
/// such a file is refused by PyTorch's distributed checkpoint, whose keys are whole tensors, rather
/// than loaded in part.
pub struct ShardWriter<D> {
    header: Vec<u8>,
    /// What is not written yet, in the order of the file: each goes once it is.
    data: VecDeque<D>,
    entries: Vec<ShardEntry>,
    size_bytes: u64,
    /// Bytes given out.
    offset: u64,
    /// The next element of the first of `data`.
    next: usize,
    /// Over the bytes given out.
    hasher: Sha256,
}

/// Row ranges that follow each other, as indices of the given tensors.
struct Run {
    slice: Slice,
    items: Vec<usize>,
}

impl<D: AsRef<[f32]>> ShardWriter<D> {
    /// A shard of `tensors`, each a row-major box of f32. [`Error::Slice`] where a length does not
    /// fit, or where two of one role overlap.
    pub fn new(tensors: Vec<(Slice, Role, D)>) -> Result<Self> {
        let mut order: BTreeMap<(Role, &Slice), usize> = BTreeMap::new();
        for (index, (slice, role, data)) in tensors.iter().enumerate() {
            let fail = |reason: String| Err(Error::Slice { slice: slice.clone(), role: *role, reason });
            let dims = slice.begin.len();
            if dims == 0 || slice.end.len() != dims || slice.begin.iter().zip(&slice.end).any(|(b, e)| b >= e)
            {
                return fail("an empty box".into());
            }
            let (given, expected) = (data.as_ref().len() as u64, slice.num_elements());
            if given != expected {
                return fail(format!("{given} elements given, {expected} expected"));
            }
            if order.insert((*role, slice), index).is_some() {
                return fail("given twice".into());
            }
        }
        // Ordered by role, tensor and row, so that runs are found by looking at the last one.
        let mut runs: BTreeMap<(Role, &str), Vec<Run>> = BTreeMap::new();
        for ((role, slice), index) in order {
            let of_tensor = runs.entry((role, &slice.tensor)).or_default();
            match of_tensor.last_mut() {
                Some(run) if run.slice.begin.len() == slice.begin.len() && follows(&run.slice, slice) => {
                    run.slice.end[0] = slice.end[0];
                    run.items.push(index);
                }
                Some(run) if run.slice.intersection(slice).is_some() => {
                    let reason = format!("overlaps {}", run.slice);
                    return Err(Error::Slice { slice: slice.clone(), role, reason });
                }
                _ => of_tensor.push(Run { slice: slice.clone(), items: vec![index] }),
            }
        }
        let mut items = Vec::new();
        let mut entries = Vec::new();
        let mut headers = Vec::new();
        for ((role, _), of_tensor) in runs {
            let alone = of_tensor.len() == 1;
            for run in of_tensor {
                let key = key(&run.slice, role, alone);
                headers.push(Tensor {
                    key: key.clone(),
                    dtype: DType::F32,
                    shape: run.slice.shape(),
                    saved_offsets: alone.then(|| run.slice.begin.clone()),
                });
                entries.push(ShardEntry { key, slice: run.slice, role, dtype: DType::F32 });
                items.extend(run.items);
            }
        }
        let header = header::encode(&headers, true);
        let size_bytes = header.len() as u64 + headers.iter().map(Tensor::size_bytes).sum::<u64>();
        let mut given: Vec<Option<D>> = tensors.into_iter().map(|(_, _, data)| Some(data)).collect();
        let data = items.into_iter().filter_map(|index| given[index].take()).collect();
        Ok(Self { header, data, entries, size_bytes, offset: 0, next: 0, hasher: Sha256::new() })
    }

    /// Length of the whole file.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What the file holds, for the manifest.
    pub fn entries(&self) -> &[ShardEntry] {
        &self.entries
    }

    /// What goes with the last piece: the entries, and the hash of all that was given out.
    pub fn end(&self) -> ShardEnd {
        let sha256 = Hash::from_digest(&self.hasher.clone().finalize());
        ShardEnd { entries: self.entries.clone(), sha256 }
    }

    /// Puts the next piece of the file, at most [`CHUNK_BYTES`], into `out`; `None` after the last.
    pub fn next_chunk(&mut self, out: &mut Vec<u8>) -> Option<Chunk> {
        out.clear();
        let offset = self.offset;
        if offset == self.size_bytes {
            return None;
        }
        let header = &self.header[self.header.len().min(offset as usize)..];
        out.extend_from_slice(&header[..header.len().min(CHUNK_BYTES)]);
        // Both the header and the chunk are whole numbers of elements long.
        while out.len() < CHUNK_BYTES
            && let Some(first) = self.data.front()
        {
            let elements = &first.as_ref()[self.next..];
            let count = elements.len().min((CHUNK_BYTES - out.len()) / 4);
            out.extend(elements[..count].iter().flat_map(|x| x.to_le_bytes()));
            self.next += count;
            if count == elements.len() {
                self.data.pop_front();
                self.next = 0;
            }
        }
        self.offset += out.len() as u64;
        self.hasher.update(&*out);
        Some(Chunk { offset, last: self.offset == self.size_bytes })
    }
}

/// Whether `slice` begins in dimension 0 where `run` ends, and is cut alike in the others.
fn follows(run: &Slice, slice: &Slice) -> bool {
    run.end[0] == slice.begin[0] && run.begin[1..] == slice.begin[1..] && run.end[1..] == slice.end[1..]
}

fn key(slice: &Slice, role: Role, alone: bool) -> String {
    let mut key = slice.tensor.clone();
    if role != Role::Parameter {
        key = format!("{key}#{}", role.name());
    }
    if !alone {
        key = format!("{key}@{}", slice.begin[0]);
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn rows(tensor: &str, rows: std::ops::Range<u64>, width: u64) -> Slice {
        Slice { tensor: tensor.into(), begin: vec![rows.start, 0], end: vec![rows.end, width] }
    }

    fn file(mut writer: ShardWriter<Vec<f32>>) -> Vec<u8> {
        let (mut file, mut chunk) = (Vec::new(), Vec::new());
        while let Some(Chunk { offset, last }) = writer.next_chunk(&mut chunk) {
            assert_eq!(offset, file.len() as u64);
            assert!(!chunk.is_empty() && chunk.len() <= CHUNK_BYTES);
            file.extend_from_slice(&chunk);
            assert_eq!(last, file.len() as u64 == writer.size_bytes());
        }
        file
    }

    #[test]
    fn another_reader_finds_the_same_tensors() {
        // More than two pieces, so that one tensor goes over a border.
        let numbers: Vec<f32> = (0..700_000).map(|i| i as f32).collect();
        let writer = ShardWriter::new(vec![
            (rows("a", 5..7, 2), Role::Parameter, vec![9.0; 4]),
            (rows("w", 0..7000, 100), Role::Parameter, numbers.clone()),
            (rows("a", 5..7, 2), Role::M, vec![8.0; 4]),
        ])
        .unwrap();
        let file = file(writer);
        assert!(file.len() > 2 * CHUNK_BYTES);
        let read = SafeTensors::deserialize(&file).unwrap();
        let w = read.tensor("w").unwrap();
        assert_eq!(w.shape(), [7000, 100]);
        assert!(w.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).eq(numbers));
        assert_eq!(read.tensor("a#m").unwrap().data()[..4], 8f32.to_le_bytes());
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let metadata = metadata.metadata().as_ref().unwrap();
        assert_eq!(metadata["format"], "pt");
        assert!(metadata["DCP_SHARDING_INFO"].contains(r#""a":{"saved_offsets":[5,0]}"#), "{metadata:?}");
    }

    #[test]
    fn adjacent_rows_are_one_entry_and_others_have_keys_of_their_own() {
        let part =
            |r: std::ops::Range<u64>| (rows("a", r.clone(), 1), Role::V, r.map(|i| i as f32).collect());
        let writer = ShardWriter::new(vec![part(2..4), part(0..2), part(6..8)]).unwrap();
        let keys: Vec<&str> = writer.entries().iter().map(|entry| entry.key.as_str()).collect();
        assert_eq!(keys, ["a#v@0", "a#v@6"]);
        assert_eq!(writer.entries()[0].slice, rows("a", 0..4, 1));
        let file = file(writer);
        let read = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("a#v@0").unwrap().data()[12..], 3f32.to_le_bytes());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error =
            |tensors: Vec<(Slice, Role, Vec<f32>)>| ShardWriter::new(tensors).err().unwrap().to_string();
        let a = |r: std::ops::Range<u64>, n: usize| (rows("a", r, 1), Role::Parameter, vec![0.0; n]);
        assert_eq!(error(vec![a(0..3, 2)]), "parameter a[0..3, 0..1]: 2 elements given, 3 expected");
        assert_eq!(error(vec![a(0..3, 3), a(2..4, 2)]), "parameter a[2..4, 0..1]: overlaps a[0..3, 0..1]");
        assert_eq!(error(vec![a(0..3, 3), a(0..3, 3)]), "parameter a[0..3, 0..1]: given twice");
        assert_eq!(error(vec![a(3..3, 0)]), "parameter a[3..3, 0..1]: an empty box");
    }
}
