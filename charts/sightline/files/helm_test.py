"""What `helm test` runs in the gateway's image: every URL answers 200, and the pipeline captions a picture."""

import io
import os
import sys
from pathlib import Path

import httpx
from PIL import Image, ImageDraw

for url in sys.argv[1:]:
    answer = httpx.get(url, timeout=30)
    print(answer.status_code, url)
    answer.raise_for_status()

if gateway := os.environ["GATEWAY"]:
    picture, file = Image.new("RGB", (336, 336), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((80, 80, 260, 260), fill="red")
    picture.save(file, "PNG")
    keys = Path(os.environ["API_KEY_FILE"])
    headers = {"X-API-Key": keys.read_text().split()[0]} if keys.exists() else {}
    answer = httpx.post(f"{gateway}/caption", files={"image": file.getvalue()}, headers=headers, timeout=150)
    print(answer.status_code, answer.text)
    answer.raise_for_status()
    if not answer.json()["caption"]:
        sys.exit("the caption is empty")
