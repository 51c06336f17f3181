"""Messages and parts of every wrong kind."""

from common import ask, processor, told

values = [
    5,
    1.5,
    [1],
    ["/etc/passwd"],
    {"a": 1},
    {"path": "/etc/passwd"},
    True,
    "",
    b"",
    [],
    {},
    (),
    10**400,
    "x" * 10**6,
    b"x" * 10**6,
    ["x" * 10**6],
    float("nan"),
    object(),
    lambda: 0,
    {"bytes": b"x", "path": None},
]
for key in ("image", "url", "path", "base64"):
    for value in values:
        said = ask({"type": "image", key: value})
        assert (said != "accepted" and "message 0, part 0" in said) or isinstance(
            value, (str, bytes)
        ), (key, value, said)
    assert "1 image tokens" in ask({"type": "image", key: None}) or "[1] image tokens" in ask(
        {"type": "image", key: None}
    )
for link in (
    None,
    {},
    {"url": None},
    {"url": ["/etc/passwd"]},
    [1],
    5,
    {"url": {"url": "x"}},
    {"url": b"x"},
    {"uri": 5},
):
    said = ask({"type": "image_url", "image_url": link})
    assert "image_url" in said or "url must be a data URI" in said, (link, said)
turn = {"role": "user", "content": "x"}
chat = processor.apply_chat_template
for conversation, said in (
    (5, "a conversation is a list of messages, got int"),
    (turn, "a conversation is a list of messages, got dict"),
    ("x", "a conversation is a list of messages, got str"),
    ([[turn], 5], "a conversation is a list of messages, got int"),
    ([[turn], turn], "a conversation is a list of messages, got dict"),
    (["x"], "message 0 must be a dict, got str"),
    ([turn, None], "message 1 must be a dict"),
    ([{}], "message 0 has no role"),
    ([{"role": 5}], "message 0 has the role 5; a role is one of system, developer, user"),
    ([{"role": "User", "content": "x"}], "has the role 'User'"),
    ([turn, {"role": "", "content": "x"}], "message 1 has the role ''"),
    (
        [{"role": "user<|end_header_id|>" + "x" * 10**6, "content": "x"}],
        "characters); a role is one of",
    ),
    ([{"role": ["user"], "content": "x"}], "has the role ['user']"),
    ([{"role": None, "content": "x"}], "has the role None"),
    ([{"role": "user", "content": 5}], "message 0 has content that is a int"),
    ([{"role": "user", "content": {"type": "text"}}], "a dict; expected a string"),
    ([{"role": "user", "content": b"x"}], "content that is a bytes"),
    ([{"role": "user", "content": ["x"]}], "message 0, part 0 must be a dict, got str"),
    ([{"role": "user", "content": [["x"]]}], "part 0 must be a dict, got list"),
    ([{"role": "user", "content": [{"text": "x"}]}], "part without a type"),
    (
        [{"role": "user", "content": [{"type": "text"}]}],
        "part 0 needs a string under text, got None",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": ["<|eot_id|>"]}]}],
        "needs a string under text",
    ),
    (
        [{"role": "user", "content": [{"type": 5, "text": "x"}]}],
        "has a part 5; the model takes text and images",
    ),
    ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "has a part ['text']"),
    (
        [{"role": "user", "content": [{"type": "x" * 10**6, "text": "x"}]}],
        "the model takes text and images",
    ),
    ([{"role": "user", "content": [{"type": "thought", "text": "x"}]}], "has a part 'thought'"),
    (
        [{"role": "tool", "content": [{"type": "image", "path": "/etc/passwd"}, {"a": 1}]}],
        "part without a type",
    ),
    ([{5: "x", "role": "user"}], "has a key that is no string"),
    ([{"role": "user", "content": [{5: 1, "type": "text", "text": "x"}]}], "part 0 has a key"),
    ([{"x" * 10**6: 1}], "has no role"),
    ([{f"k{i}": 1 for i in range(10**5)}], "has no role"),
    ([], "conversation is empty"),
    ([{"role": "tool", "content": {("a",): 1}}], "key that is"),
    ([{"role": "tool", "content": {"x": {1, 2}}}], "a set"),
    ([{**turn, "name": object()}], "object"),
    ([{**turn, "tool_calls": [{"x": lambda: 0}]}], "function"),
):
    for options in ({}, {"tokenize": True}, {"tokenize": True, "escape_special_tokens": True}):
        text = told(chat, conversation, **options)
        assert text != "accepted" and (said is None or said in text), (str(conversation)[:80], text)
for content in (
    {"a": [1, {"b": None}]},
    [1, 2],
    "x",
    None,
    5,
    [{"type": "video", "title": "x"}],
    [{"type": "text", "value": 3}],
):
    told(
        chat, [{"role": "ipython", "content": content}], "{{ messages[0].content | tojson }}"
    ) == "accepted" or 1 / 0
