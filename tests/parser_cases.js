/* Run tests/parser_cases.json through a parser of the browser client, cut in every way. */
(Parser, cases) => {
  const outcome = (pieces) => {
    const parser = new Parser();
    const events = pieces.flatMap((piece) => parser.feed(piece)).map(({ event, text, id }) => [event, text, id]);
    return JSON.stringify([events, parser.lastEventId, parser.retry ?? null]);
  };
  const wrong = [];
  let checked = 0;
  for (const { name, body, events, last_event_id, retry_ms } of cases) {
    const bytes = Uint8Array.from(body, (character) => character.charCodeAt(0));
    const expected = JSON.stringify([events, last_event_id, retry_ms]);
    const check = (how, pieces) => {
      checked += 1;
      const got = outcome(pieces);
      if (got !== expected) wrong.push(`${name}, ${how}: ${got} and not ${expected}`);
    };
    check("whole", [bytes]);
    check("byte by byte", [...bytes].flatMap((byte) => [Uint8Array.of(byte), new Uint8Array()]));
    for (let at = 0; at <= bytes.length; at += 1) check(`cut at ${at}`, [bytes.slice(0, at), bytes.slice(at)]);
  }
  return { wrong, checked };
}
