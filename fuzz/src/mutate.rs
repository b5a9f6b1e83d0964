//! Damage that knows the format: it changes what an image says while most of it stays believable.

use super::anatomy::{Anatomy, Field, Kind, number, put};
use super::choices::Choices;

/// An image file: `bytes`, then zeroes up to `length`.
#[derive(Clone, Debug)]
pub struct File {
    pub bytes: Vec<u8>,
    pub length: u64,
}

impl File {
    /// A file that is nothing but `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        File { bytes, length }
    }
}

/// Damages the file in one to four places; says how.
pub fn mutate(file: &mut File, choices: &mut Choices) -> Vec<String> {
    // Mostly one: the less is wrong, the further it gets.
    let count = 1 + choices.below(4) * choices.below(2);
    (0..count).map(|_| once(file, choices)).collect()
}

/// Damages the file in one place; says how.
pub fn once(file: &mut File, choices: &mut Choices) -> String {
    let fields = Anatomy::of(&file.bytes).map(|a| a.fields()).unwrap_or_default();
    let cluster_bits = Anatomy::of(&file.bytes).map_or(9, |a| a.cluster_bits);
    match choices.below(100) {
        0..50 => set_field(file, &fields, choices),
        50..60 => copy_field(file, &fields, choices),
        60..68 => overwrite_cluster(file, cluster_bits, choices),
        68..74 => resize(file, cluster_bits, choices),
        74..80 => extension(file, choices),
        80..90 => scribble(file, &fields, choices),
        _ => feature(file, choices),
    }
}

/// A field of a kind that is chosen first, since some kinds have many more fields than others.
fn choose(fields: &[Field], choices: &mut Choices) -> Option<Field> {
    const KINDS: [Kind; 9] = [
        Kind::Header,
        Kind::Header,
        Kind::L2,
        Kind::L2,
        Kind::L1,
        Kind::RefcountTable,
        Kind::RefcountBlock,
        Kind::Snapshot,
        Kind::Extension,
    ];
    let kind = *choices.pick(&KINDS)?;
    let of_kind: Vec<Field> = fields.iter().copied().filter(|f| f.kind == kind).collect();
    choices.pick(if of_kind.is_empty() { fields } else { &of_kind }).copied()
}

fn set_field(file: &mut File, fields: &[Field], choices: &mut Choices) -> String {
    let Some(field) = choose(fields, choices) else { return scribble(file, fields, choices) };
    let old = number(&file.bytes, field.at, field.width).unwrap_or(0);
    let new = interesting(file, field, old, choices);
    put(&mut file.bytes, field.at, field.width, new);
    format!("{:?} field at {:#x}: {old:#x} -> {new:#x}", field.kind, field.at)
}

/// A value that a careless reader would stumble over.
fn interesting(file: &File, field: Field, old: u64, choices: &mut Choices) -> u64 {
    let width = field.width as u64 * 8;
    let cluster_bits = Anatomy::of(&file.bytes).map_or(9, |a| a.cluster_bits);
    let clusters = file.length.div_ceil(1 << cluster_bits);
    let an_offset = choices.below(clusters + 2) << cluster_bits;
    let flags = old & !0x00ff_ffff_ffff_fe00;
    match choices.below(16) {
        0 => 0,
        1 => u64::MAX,
        2 => old.wrapping_add(1),
        3 => old.wrapping_sub(1),
        4 => old ^ 1 << choices.below(width),
        5 => old.wrapping_add(1 << cluster_bits),
        6 => choices.number(),
        7 => 1 << choices.below(width),
        8 => (1 << choices.below(width)) - 1,
        9 => file.length,
        10 => flags | file.length.next_multiple_of(1 << cluster_bits),
        // Flags of entries.
        11 => old ^ choices.pick(&[1 << 63, 1 << 62, 1, 3 << 62, 1 << 56, 1 << 9]).copied().unwrap_or(1),
        12 => 1 << 62 | choices.below(4) << choices.below(62) | choices.below(file.length + 1),
        // Something else's place.
        13 => an_offset,
        14 => 1 << 63 | an_offset,
        _ => flags | an_offset,
    }
}

fn copy_field(file: &mut File, fields: &[Field], choices: &mut Choices) -> String {
    let (Some(from), Some(to)) = (choose(fields, choices), choose(fields, choices)) else {
        return scribble(file, fields, choices);
    };
    let value = number(&file.bytes, from.at, from.width).unwrap_or(0);
    put(&mut file.bytes, to.at, to.width, value);
    format!("{:?} field at {:#x}: {value:#x} from the {:?} field at {:#x}", to.kind, to.at, from.kind, from.at)
}

fn overwrite_cluster(file: &mut File, cluster_bits: u64, choices: &mut Choices) -> String {
    let size = 1usize << cluster_bits;
    let clusters = (file.bytes.len() / size) as u64;
    let target = choices.below(clusters) as usize * size;
    let (bytes, what) = match choices.below(3) {
        0 => (vec![0; size], "zeroes".to_owned()),
        1 => (vec![0xff; size], "ones".to_owned()),
        _ => {
            let source = choices.below(clusters) as usize * size;
            let bytes = file.bytes.get(source..source + size).unwrap_or_default().to_vec();
            (bytes, format!("the one at {source:#x}"))
        }
    };
    if let Some(cluster) = file.bytes.get_mut(target..target + bytes.len()) {
        cluster.copy_from_slice(&bytes);
    }
    format!("cluster at {target:#x}: {what}")
}

fn resize(file: &mut File, cluster_bits: u64, choices: &mut Choices) -> String {
    let length = match choices.below(6) {
        0 => choices.below(file.length + 1),
        1 => choices.below(file.length + 1) >> cluster_bits << cluster_bits,
        2 => choices.below(file.length + 1) & !511,
        3 => file.length + choices.below(4 << cluster_bits),
        4 => (file.length + choices.below(4 << cluster_bits)).next_multiple_of(1 << cluster_bits),
        _ => file.length << choices.below(12),
    };
    file.length = length;
    file.bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
    format!("length {length:#x}")
}

/// Puts a header extension before the others.
fn extension(file: &mut File, choices: &mut Choices) -> String {
    let v3 = number(&file.bytes, 4, 4) == Some(3);
    let start = if v3 { number(&file.bytes, 100, 4).unwrap_or(104) } else { 72 };
    let kinds = [0, 0xe279_2aca, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441, 0x1234_5678];
    let kind: u32 = choices.pick(&kinds).copied().unwrap_or(0);
    let real = choices.pick(&[0u64, 3, 8, 16, 24, 48, 96, 200]).copied().unwrap_or(0);
    let claimed = match choices.below(4) {
        0 => real + choices.below(1 << 12),
        1 => u64::MAX >> choices.below(64),
        _ => real,
    };
    let mut new = kind.to_be_bytes().to_vec();
    new.extend((claimed as u32).to_be_bytes());
    new.extend((0..real.next_multiple_of(8)).map(|_| if choices.chance(70) { 0 } else { choices.number() as u8 }));
    let (Ok(start), cluster) = (usize::try_from(start), 512usize) else { return "nothing".to_owned() };
    let end = (start.saturating_add(new.len())).min(cluster).min(file.bytes.len());
    if let Some(place) = file.bytes.get_mut(start..end.max(start)) {
        // What followed moves up as far as there is room in the first sector, the least a first cluster has.
        let old = place.to_vec();
        let length = place.len();
        place.copy_from_slice(new.get(..length).unwrap_or_default());
        if let Some(rest) = file.bytes.get_mut(end..cluster.max(end)) {
            let kept = old.len().min(rest.len());
            rest.copy_within(..rest.len() - kept, kept);
            rest[..kept].copy_from_slice(&old[..kept]);
        }
    }
    format!("extension {kind:#010x} of {real} bytes that claims {claimed}")
}

/// Random bytes at or after a field, or anywhere.
fn scribble(file: &mut File, fields: &[Field], choices: &mut Choices) -> String {
    let anywhere = choices.below(file.bytes.len() as u64);
    let at = match choices.pick(fields) {
        Some(field) if choices.chance(60) => field.at,
        _ => anywhere,
    };
    let most = 1 << choices.below(8);
    let count = 1 + choices.below(most);
    for at in at..at.saturating_add(count) {
        let byte = choices.number() & 0xff;
        put(&mut file.bytes, at, 1, byte);
    }
    format!("{count} random bytes at {at:#x}")
}

/// Turns a feature bit over, or changes the version.
fn feature(file: &mut File, choices: &mut Choices) -> String {
    let (at, bit) = match choices.below(8) {
        0..4 => (72, choices.below(6)),
        4 => (80, choices.below(2)),
        5 => (88, choices.below(3)),
        6 => (4, 0),
        _ => (72 + choices.below(3) * 8, choices.below(64)),
    };
    let width = if at == 4 { 4 } else { 8 };
    let old = number(&file.bytes, at, width).unwrap_or(0);
    put(&mut file.bytes, at, width, old ^ 1 << bit);
    format!("bit {bit} of the header field at {at}")
}
