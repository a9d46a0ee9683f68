//! Where in a JSON document an offset is: `process.rlimits[0].type`.
//!
//! serde's errors tell line and column, users want the field. A library that follows a deserialisation step by step
//! would generate every type of the spec a second time.

/// One level of nesting.
enum Level {
    Object(Option<String>),
    Array(usize),
}

/// The path of what ends at the byte that serde_json calls `line` and `column` (both from 1).
pub fn path_at(json: &[u8], line: usize, column: usize) -> String {
    let start: usize = json
        .split_inclusive(|&byte| byte == b'\n')
        .take(line.saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    let end = start.saturating_add(column).min(json.len());
    show(&levels(json.get(..end).unwrap_or_default()))
}

fn levels(json: &[u8]) -> Vec<Level> {
    let mut levels = Vec::new();
    let mut key_expected = false;
    let mut bytes = json.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'{' => {
                levels.push(Level::Object(None));
                key_expected = true;
            }
            b'[' => {
                levels.push(Level::Array(0));
                key_expected = false;
            }
            b'}' | b']' => {
                levels.pop();
                key_expected = false;
            }
            b',' => match levels.last_mut() {
                Some(Level::Object(key)) => {
                    *key = None;
                    key_expected = true;
                }
                Some(Level::Array(index)) => *index += 1,
                None => {}
            },
            b':' => key_expected = false,
            b'"' => {
                let text = string(&mut bytes);
                if key_expected && let Some(Level::Object(key)) = levels.last_mut() {
                    *key = Some(text);
                }
            }
            _ => {}
        }
    }
    levels
}

/// The rest of a string whose quote is behind us; escapes stay as they are.
fn string(bytes: &mut impl Iterator<Item = u8>) -> String {
    let mut text = Vec::new();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => break,
            b'\\' => {
                text.push(byte);
                text.extend(bytes.next());
            }
            _ => text.push(byte),
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn show(levels: &[Level]) -> String {
    let mut path = String::new();
    for level in levels {
        match level {
            Level::Object(Some(key)) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
            }
            Level::Object(None) => {}
            Level::Array(index) => path.push_str(&format!("[{index}]")),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_paths() {
        let json = r#"{"a": {"b,\"}": [1, {"c": "x"}], "d": []}, "e": 1}"#;
        for (end, path) in [
            ("\"x\"", r#"a.b,\"}[1].c"#),
            ("[1", r#"a.b,\"}[0]"#),
            ("\"d\"", "a.d"),
            ("[]}", "a"),
            ("\"e\": 1", "e"),
        ] {
            let column = json.find(end).unwrap() + end.len();
            assert_eq!(path_at(json.as_bytes(), 1, column), path, "{end}");
        }
        let lines = "{\n\"a\":\n 5}";
        assert_eq!(path_at(lines.as_bytes(), 3, 2), "a");
        assert_eq!(path_at(b"", 7, 9), "");
    }
}
